"""`pgfast serve`: one engine behind HTTP.

cli.py            parses words, binds the port, loads the engine
serving.py        uvicorn, its start and its graceful end
app.py            the ASGI application: routes inside, limits around them
config.py         every limit
protocol.py       what may happen on a connection before there is a request
metrics.py        counts every request; /metrics
access.py         API keys, origins
admission.py      places, deadlines, draining
bodies.py         bodies of requests, read within limits; JSON; pictures in text
forms.py          multipart forms
streams.py        server-sent events
service.py        AnswerService: from a question to the engine and back
picture_cache.py  encoded pictures, by their bytes
remote_pictures.py  pictures by URL, from named hosts with public addresses
answer_api.py     POST /v1/answer
chat_api.py       POST /v1/chat/completions, GET /v1/models, for OpenAI's clients
chat_schema.py chat_answer_schema.py chat_reply.py chat_logprobs.py   their requests, answers, chunks, tokens
openapi.py        GET /openapi.json: the description of all routes
openapi_operations.py openapi_errors.py openapi_models.py   what is in it
page.py           the page at /; its files are in page_files/
health.py         /healthz, /readyz, /metrics
http_errors.py    every error as JSON
"""
