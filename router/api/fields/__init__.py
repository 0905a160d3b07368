"""The fields of a request's body: those of chats, of completions and of both, and what each may be.

Owns their names, their checks and the messages of these. A body's form is `router.api.body`'s.
"""
