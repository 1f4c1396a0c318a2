"""`wisp-edge serve`: this device's draft model and a WISP server behind the HTTP interfaces of TGI and of OpenAI.

    client ── HTTP ──▶ route: check ─▶ Sessions.start ─▶ Generation (a thread) ── gRPC ──▶ wisp_verifier
       ◀── JSON or server-sent events ─── batches of tokens ◀──────┘  ▲ drafts: DraftDealer, one graph for all

    app.py                the application            tgi.py, openai.py, parameters.py   bodies, answers
    *_routes.py           routes; ui/ is the page    service.py     what every route does
    http.py, errors.py    bodies, events, hang-ups   sessions.py    who may run           generation.py  one session
    device.py             what sessions share        drafting.py    who drafts            speculation.py one controller
    workers.py            their threads              spare.py       a connection at hand  transport.py   one to be left
"""
