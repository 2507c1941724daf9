/* What the two halves share: callbacks.c is called by the server, functions.c calls it. */

#ifndef NBDKITOCAML_PLUGIN_H
#define NBDKITOCAML_PLUGIN_H

/* What the callback that this thread is in has given to set_error; 0: nothing. */
extern __thread int callback_errno;

#endif
