/* lowrank.c in wide words. */
#define WIDE
#include "lowrank.c"
