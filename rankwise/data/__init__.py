"""Rows become conversations, conversations become tokens with a mask of what is trained.  Torch-free.

read_rows → read_document → Template → prepare → Corpus → split
"""
