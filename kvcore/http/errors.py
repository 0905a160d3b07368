"""How a call over HTTP fails. Its own deadline is a TimeoutError. All are OSErrors, as those of sockets are."""


class BrokenCallError(OSError):
    """The other side cannot be reached, broke off, or does not speak HTTP/1.1; the message is for people."""


class ProofNotTakenError(BrokenCallError):
    """Our proof was refused, by an answer that is not proved itself: whether a process of the cluster says so is not
    known."""


class ConnectTimeoutError(BrokenCallError):
    """A connection took too long."""
