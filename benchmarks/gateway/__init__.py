"""What a gateway costs: UpChatty beside nginx, other gateways and the naive way. See docs/benchmarks.md."""
