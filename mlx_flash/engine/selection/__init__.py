"""Which bundles a token needs: one file per selector."""
