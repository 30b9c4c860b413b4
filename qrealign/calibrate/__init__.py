"""Learning the quantizer so that it repairs alignment: two engines, and the methods that configure them."""
