"""Who is next: the order of the waiting queue, and the replica of a request."""
