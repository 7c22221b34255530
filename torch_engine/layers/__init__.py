"""What layers are made of: attention, norms, routers, feed-forwards."""
