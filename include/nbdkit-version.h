/* The version of nbdkit that these headers belong to.
 *
 * Plugins need it only to tell which functions there are; a filter carries it, because the layout of struct
 * nbdkit_filter belongs to it.
 */

#ifndef NBDKIT_VERSION_H
#define NBDKIT_VERSION_H

#define NBDKIT_VERSION_MAJOR 1
#define NBDKIT_VERSION_MINOR 46
#define NBDKIT_VERSION_MICRO 0
#define NBDKIT_VERSION_STRING "1.46.0"

#endif
