"""From an adapter's folder to what one TP rank holds of it: read, checked, cut, or refused."""
