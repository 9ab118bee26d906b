"""Function calling as BFCL v3 asks for it and judges it: single calls, several, none, and conversations that are executed."""
