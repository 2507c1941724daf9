/* What plugins and filters share: constants, and the functions of the server that both may call.
 *
 * There is no library to link with. The program that loads a plugin has these functions: nbdkit for clients over
 * NBD, nbdkit-mount for the kernel through FUSE.
 */

#ifndef NBDKIT_COMMON_H
#define NBDKIT_COMMON_H

#if !defined (NBDKIT_PLUGIN_H) && !defined (NBDKIT_FILTER_H)
#error include <nbdkit-plugin.h> or <nbdkit-filter.h>, which include this header
#endif

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <sys/socket.h>

#include <nbdkit-version.h>

/* For definitions outside an extern "C" block, and symbols that -fvisibility=hidden must not hide. */
#ifdef __cplusplus
#define NBDKIT_CXX_LANG_C extern "C"
#else
#define NBDKIT_CXX_LANG_C
#endif
#define NBDKIT_DLL_PUBLIC __attribute__ ((__visibility__ ("default")))
#define NBDKIT_EXTERN_DECL(ret, fn, args) extern ret fn args

/* Arguments that do not fit their format are found when the plugin is compiled. %m is allowed. */
#ifdef __GNUC__
#define ATTRIBUTE_FORMAT_PRINTF(format, arguments) \
  __attribute__ ((__format__ (__printf__, format, arguments)))
#else
#define ATTRIBUTE_FORMAT_PRINTF(format, arguments)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Thread models: how many requests may be in the plugin at the same time. */
#define NBDKIT_THREAD_MODEL_SERIALIZE_CONNECTIONS  0 /* one connection, and on it one request */
#define NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS 1 /* one in the whole server */
#define NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS     2 /* one on each connection */
#define NBDKIT_THREAD_MODEL_PARALLEL               3 /* any number */

/* Flags of requests. */
#define NBDKIT_FLAG_MAY_TRIM  (1 << 0) /* zero: a hole will do */
#define NBDKIT_FLAG_FUA       (1 << 1) /* pwrite, trim, zero: durable when the call returns */
#define NBDKIT_FLAG_REQ_ONE   (1 << 2) /* extents: the first one is enough */
#define NBDKIT_FLAG_FAST_ZERO (1 << 3) /* zero: fail with ENOTSUP unless faster than writing */

/* Answers of can_fua. */
#define NBDKIT_FUA_NONE    0 /* clients are not offered the flag */
#define NBDKIT_FUA_EMULATE 1 /* the server calls flush after the request */
#define NBDKIT_FUA_NATIVE  2 /* the plugin gets the flag */

/* Answers of can_cache. */
#define NBDKIT_CACHE_NONE    0 /* clients are not offered the request */
#define NBDKIT_CACHE_EMULATE 1 /* the server reads and throws away */
#define NBDKIT_CACHE_NATIVE  2 /* the plugin gets the request */

/* Types of extents, as in NBD's base:allocation. 0 is allocated data. */
#define NBDKIT_EXTENT_HOLE (1 << 0) /* nothing is allocated */
#define NBDKIT_EXTENT_ZERO (1 << 1) /* reads as zeroes */

/* A handle for plugins whose connections have no state. It is not to be dereferenced. */
#define NBDKIT_HANDLE_NOT_NEEDED (&errno)

/* Messages. They are like printf, with %m for the text of errno, and end without a newline. errno is the same
 * afterwards. debug says something only when the server is verbose (-v). An error of a request is logged, and can be
 * sent to the client with the reply.
 */
extern void nbdkit_error (const char *format, ...) ATTRIBUTE_FORMAT_PRINTF (1, 2);
extern void nbdkit_verror (const char *format, va_list args) ATTRIBUTE_FORMAT_PRINTF (1, 0);
extern void nbdkit_debug (const char *format, ...) ATTRIBUTE_FORMAT_PRINTF (1, 2);
extern void nbdkit_vdebug (const char *format, va_list args) ATTRIBUTE_FORMAT_PRINTF (1, 0);

/* Debug messages with the bytes of a buffer, or with the rows in which two buffers differ. Each line begins with the
 * prefix, or with nothing if that is NULL; start is the offset of the first byte.
 */
extern void nbdkit_debug_hexdump (const void *buf, size_t len, const char *prefix, uint64_t start);
extern void nbdkit_debug_hexdiff (const void *before, const void *after, size_t len, const char *prefix,
                                  uint64_t start);

/* The errno of the request that this thread is in, should it fail. */
extern void nbdkit_set_error (int err);

/* Values of parameters. All report a value that they cannot read with nbdkit_error and return -1, or NULL. */

/* Bytes: "512", "4k", "1G", without fractions; units b, k, m, g, t, p, e (powers of 1024) and s (512). */
extern int64_t nbdkit_parse_size (const char *value);
/* 1 or 0: 1, true, t, yes, y, on and their opposites. */
extern int nbdkit_parse_bool (const char *value);
/* 0 and a number from 0 to 1, or more if the caller allows it: "0.1", "10%", "1:10", "1/10". */
extern int nbdkit_parse_probability (const char *what, const char *value, double *result);
/* 0 and a time: "5" or "5s", "20ms", "100us", "7ns". */
extern int nbdkit_parse_delay (const char *what, const char *value, unsigned *sec, unsigned *nsec);
/* 0 and an integer: decimal, 0x hexadecimal, 0 octal. `what` names it in the message. The result is written only on
 * success.
 */
extern int nbdkit_parse_int (const char *what, const char *value, int *result);
extern int nbdkit_parse_unsigned (const char *what, const char *value, unsigned *result);
extern int nbdkit_parse_int8_t (const char *what, const char *value, int8_t *result);
extern int nbdkit_parse_uint8_t (const char *what, const char *value, uint8_t *result);
extern int nbdkit_parse_int16_t (const char *what, const char *value, int16_t *result);
extern int nbdkit_parse_uint16_t (const char *what, const char *value, uint16_t *result);
extern int nbdkit_parse_int32_t (const char *what, const char *value, int32_t *result);
extern int nbdkit_parse_uint32_t (const char *what, const char *value, uint32_t *result);
extern int nbdkit_parse_int64_t (const char *what, const char *value, int64_t *result);
extern int nbdkit_parse_uint64_t (const char *what, const char *value, uint64_t *result);

/* A password: the value itself, "-" to ask on the terminal, "+FILE" its first line, "-FD" from a file descriptor.
 * 0, and a string to free().
 */
extern int nbdkit_read_password (const char *value, char **password);

/* Paths. The server goes to / when it forks, so that relative ones must be made absolute while parameters are read.
 * A string to free(), or NULL. realpath also resolves symbolic links and needs the file to exist.
 */
extern char *nbdkit_absolute_path (const char *path);
extern char *nbdkit_realpath (const char *path);

/* Copies of strings that need no free(). They stay until the connection ends, and those made outside any connection
 * until the server does.
 */
extern const char *nbdkit_strdup_intern (const char *string);
extern const char *nbdkit_strndup_intern (const char *string, size_t length);
extern const char *nbdkit_printf_intern (const char *format, ...) ATTRIBUTE_FORMAT_PRINTF (1, 2);
extern const char *nbdkit_vprintf_intern (const char *format, va_list args) ATTRIBUTE_FORMAT_PRINTF (1, 0);

/* 1 while standard input and output are the plugin's to use, at the start; 0 when they belong to a client. */
extern int nbdkit_stdio_safe (void);

/* Sleeps. -1 with errno ESHUTDOWN when it ended early: the client is gone or the server stops. */
extern int nbdkit_nanosleep (unsigned sec, unsigned nsec);

/* The connection that this thread is in: the export that the client asked for, whether it speaks TLS, and who it is.
 * -1, or NULL, when it has no such thing; a client of nbdkit-mount is the kernel, which has none. The three last
 * return strings to free().
 */
extern const char *nbdkit_export_name (void);
extern int nbdkit_is_tls (void);
extern int nbdkit_peer_name (struct sockaddr *addr, socklen_t *addrlen);
extern int64_t nbdkit_peer_pid (void);
extern int64_t nbdkit_peer_uid (void);
extern int64_t nbdkit_peer_gid (void);
extern char *nbdkit_peer_security_context (void);
extern char *nbdkit_peer_tls_dn (void);
extern char *nbdkit_peer_tls_issuer_dn (void);

/* Asks the server to end, or this connection to: when its requests are done, or with force at once. */
extern void nbdkit_shutdown (void);
extern void nbdkit_disconnect (int force);

/* What the callback extents fills. Extents are added in ascending order without gaps; those outside the range of the
 * request are ignored. 0, or -1.
 */
struct nbdkit_extents;
extern int nbdkit_add_extent (struct nbdkit_extents *extents, uint64_t offset, uint64_t length, uint32_t type);

/* What the callback list_exports fills. The description may be NULL. use_default_export adds what default_export
 * answers. 0, or -1.
 */
struct nbdkit_exports;
extern int nbdkit_add_export (struct nbdkit_exports *exports, const char *name, const char *description);
extern int nbdkit_use_default_export (struct nbdkit_exports *exports);

#ifdef __cplusplus
}
#endif

#endif
