"""The resilient shape on Ray Serve: two models behind one URL, replicas that die, and replicas that come and go by load."""


from test_serve import CHAT, CHAT_URL, COMPLETION_URL, Server, chat, server_of, steps_of  # noqa: F401

