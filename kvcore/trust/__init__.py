"""What the processes of one cluster know each other by: the cluster's secret and the keys derived from it.

Owns every byte of a secret: none is in a repr, an error or the log. Imports cryptography; opens no socket.
"""
