"""Several servers behind one address: each request goes to the one where its adapter is."""
