"""The paper's claims, tried."""
