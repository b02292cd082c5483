"""What a server tells about its adapters: facts, Prometheus series, data parallel replicas together."""
