"""The same maths, made to fit and made fast. A first-time reader may skip this folder."""
