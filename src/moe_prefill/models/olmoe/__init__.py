"""OLMoE: q and k normalised over their full width, q, k and v optionally clipped."""
