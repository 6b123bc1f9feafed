"""An adapter, or several, folded into the weights of the base."""
