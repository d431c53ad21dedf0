"""Serving a steered model: any dose, any vector, per request.

`requests.py` reads what a request asks for, `vectors.py` holds the vectors that may be asked for, `steering_op.py` does it to a batch of tokens,
`plugin.py` carries all three into stock vLLM, `endpoints.py` adds the routes beside vLLM's own. Nothing is imported until it is used: the plugin
is loaded into every process of vLLM.
"""
