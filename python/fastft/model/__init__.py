"""The model of a run: found, read from its folder, quantized if asked, and given its adapter.

Data comes from a folder that `hub.locate` found; `training` and `chat` take it from here.
"""
