"""The engine on a cluster, by Ray: `build_processor` over Ray Data, the server over Ray Serve (extra `scale`)."""

from pgfast.scale.processor import PgfastProcessorConfig, Processor, build_processor

__all__ = ["PgfastProcessorConfig", "Processor", "build_processor"]
