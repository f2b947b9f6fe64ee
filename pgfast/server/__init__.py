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
answer_api.py     POST /v1/answer
health.py         /healthz, /readyz, /metrics
http_errors.py    every error as JSON
"""
