"""Conversions of weights: a plan says what each output tensor is made of, the native stream makes it.

Nothing here imports torch or transformers unless the names of an adapter do not match the files of its base.
"""
