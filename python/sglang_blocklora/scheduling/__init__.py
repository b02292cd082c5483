"""The order of the waiting queue: what is already there first, within an age bound and every adapter's share."""
