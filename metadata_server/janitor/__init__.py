"""What of all that a metadata server keeps is orphaned: said by kind, and removed when it is ordered.

Owns no state: what the index holds is looked for by `index.orphans`, what is written down by `leftovers` here.
"""
