"""What of a cluster file the processes go by, how that changes, and which of it while they run.

Pure, but for the reading of a file again. Imports the schema and what reads it.
"""
