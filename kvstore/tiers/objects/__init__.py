"""Chunks as objects of a bucket (S3, GCS, Azure) or as files of a folder, through obstore.

Owns the names of objects and when they end. Whatever a bucket gives back is verified as any chunk is.
"""
