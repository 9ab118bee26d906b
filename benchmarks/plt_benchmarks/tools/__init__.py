"""Function calling as BFCL v3 asks for it and judges it: one call, several, none, and conversations."""
