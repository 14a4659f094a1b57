"""The scoring server: HTTP APIs that people already use, in front of one scoring engine. Torch-free.

Read in this order: ``scheduler`` (the one thread that owns the engine), ``endpoints`` (what may be asked), ``service``
(one request from its bytes to its reply), ``app`` (HTTP), ``batches`` (files of requests at low priority).
"""
