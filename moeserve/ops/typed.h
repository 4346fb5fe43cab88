/* Every op that depends on the element type, in the order in which they build on one another. */
#include "dot.h"
#include "pointwise.h"
#include "router.h"
#include "experts.h"
#include "attention.h"
