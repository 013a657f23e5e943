/* attention.c in wide words. */
#define WIDE
#include "attention.c"
