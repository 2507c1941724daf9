/* Going in and out of the OCaml runtime. See runtime.c. */

#ifndef NBDKITOCAML_RUNTIME_H
#define NBDKITOCAML_RUNTIME_H

#include <stdbool.h>

/* Before caml_startup_exn, and after it, still in the runtime; false, after an error message, if it cannot be used. */
extern void before_startup (void);
extern bool after_startup (void);

/* Round everything that touches an OCaml value. They do not nest. */
extern void enter_runtime (void);
extern void leave_runtime (void);

/* Round something that blocks, inside the runtime: others may go in meanwhile, if that is possible at all. */
extern void begin_blocking (void);
extern void end_blocking (void);

/* Inside the runtime, for the last time: threads that end later leave it alone. */
extern void stop_runtime (void);

#endif
