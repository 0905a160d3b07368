"""`kvferry demo`: a small real model, a whole cluster, two questions over one document.

Owns the conversion of the model and what a person sees of it. Bringing a cluster up is `kvferry.launch`'s.
"""
