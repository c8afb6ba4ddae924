"""The training itself: a run in order, checkpoints that survive a kill, what is logged and what is left behind.

`run.run` is the door. Data comes from `data.prepare`, the model from `model.load`; the run folder is what remains.
"""
