"""The name of a model or a data set becomes a folder on this machine.

`locate` decides where a name points: a folder or file here, what comes with fastft, or a hub. `huggingface` and
`modelscope` fetch from the hubs through their own libraries, which keep the cache, the tokens and the mirrors.
"""
