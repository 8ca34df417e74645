"""Generation: sampling, drafts and their acceptance, the loop on the device, and texts."""
