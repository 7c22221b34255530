"""Triton kernels of a decode step: one launch serves the rows of all tenants.

Weights that differ between tenants are found through tables of addresses, so a captured graph stays
right when a tenant's weights move. Rounding follows the plain path: what is rounded there to the
type of the hidden states is rounded here.

Legend: rows M (padded), tenants or slots as groups G, outputs N, inputs K, hidden H, head size D.
`EXACT` takes products of float32, as float32 models and Triton's interpreter need.
"""
