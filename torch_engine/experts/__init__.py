"""Expert pools: copies on the device, in slots, and the products that go through them."""
