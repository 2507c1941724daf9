(** Plugins for nbdkit in OCaml. nbdkit-ocaml-plugin(3) tells how to compile one; nbdkit-plugin(3) tells more about each
    callback. Sizes, counts and offsets are bytes. *)

(** What a request asks for besides its range.

    - [May_trim]: zero: a hole will do.
    - [FUA]: pwrite, trim, zero: on stable storage before the callback returns.
    - [Req_one]: extents: the first one is enough.
    - [Fast_zero]: zero: fail with [EOPNOTSUPP] rather than be slow. Only if [can_fast_zero] said yes. *)
type flag = May_trim | FUA | Req_one | Fast_zero

type flags = flag list

(** How FUA is done: not at all, by [flush], by the callbacks that get {!FUA}. *)
type fua_flag = FuaNone | FuaEmulate | FuaNative

(** How cache requests are done: not at all, by reading, by [cache] (which need not exist: then nothing is done). *)
type cache_flag = CacheNone | CacheEmulate | CacheNop

type thread_model =
  | THREAD_MODEL_SERIALIZE_CONNECTIONS
  | THREAD_MODEL_SERIALIZE_ALL_REQUESTS
  | THREAD_MODEL_SERIALIZE_REQUESTS
  | THREAD_MODEL_PARALLEL

type extent = { offset : int64; length : int64; is_hole : bool; is_zero : bool }

type export = { name : string; description : string option }

(** The server's memory with the data of a request. It is empty once the callback has returned. *)
type buf = (char, Bigarray.int8_unsigned_elt, Bigarray.c_layout) Bigarray.Array1.t

(** A plugin. ['a] is the type of its handles: whatever [open_connection] returns is given to the others. *)
type 'a plugin = {
  name : string;  (** required *)
  longname : string;
  version : string;
  description : string;
  load : (unit -> unit) option;
  get_ready : (unit -> unit) option;
  after_fork : (unit -> unit) option;
  cleanup : (unit -> unit) option;
  unload : (unit -> unit) option;
  config : (string -> string -> unit) option;
  config_complete : (unit -> unit) option;
  config_help : string;
  thread_model : (unit -> thread_model) option;
  magic_config_key : string;
  preconnect : (bool -> unit) option;
  open_connection : (bool -> 'a) option;  (** required; the argument tells whether it is read-only *)
  close : ('a -> unit) option;
  get_size : ('a -> int64) option;  (** required *)
  block_size : ('a -> int * int * int64) option;  (** minimum, preferred, maximum *)
  can_cache : ('a -> cache_flag) option;
  can_extents : ('a -> bool) option;
  can_fast_zero : ('a -> bool) option;
  can_flush : ('a -> bool) option;
  can_fua : ('a -> fua_flag) option;
  can_multi_conn : ('a -> bool) option;
  can_trim : ('a -> bool) option;
  can_write : ('a -> bool) option;
  can_zero : ('a -> bool) option;
  is_rotational : ('a -> bool) option;
  pread : ('a -> buf -> int64 -> flags -> unit) option;  (** required; fills the whole buffer *)
  pwrite : ('a -> buf -> int64 -> flags -> unit) option;
  flush : ('a -> flags -> unit) option;
  trim : ('a -> int64 -> int64 -> flags -> unit) option;  (** count, then offset; so are the next three *)
  zero : ('a -> int64 -> int64 -> flags -> unit) option;
  extents : ('a -> int64 -> int64 -> flags -> extent list) option;
  cache : ('a -> int64 -> int64 -> flags -> unit) option;
  dump_plugin : (unit -> unit) option;
  list_exports : (bool -> bool -> export list) option;  (** read-only, and whether the client speaks TLS *)
  default_export : (bool -> bool -> string) option;
  export_description : ('a -> string) option;
}

(** A plugin without any callbacks, to begin with: [{ default_callbacks with name = "myplugin"; … }]. *)
val default_callbacks : 'a plugin

(** Makes this the plugin of the library. Call it exactly once, when the library is loaded, in one of two forms: with
    labels and [()], as [register_plugin ~name:"myplugin" ~open_connection ~get_size ~pread ()], or with a record alone,
    as [register_plugin { default_callbacks with name = "myplugin"; … }].

    @raise Failure if it was called before, if something required is missing, or if the last argument is neither. *)
val register_plugin :
  ?name:string ->
  ?longname:string ->
  ?version:string ->
  ?description:string ->
  ?load:(unit -> unit) ->
  ?get_ready:(unit -> unit) ->
  ?after_fork:(unit -> unit) ->
  ?cleanup:(unit -> unit) ->
  ?unload:(unit -> unit) ->
  ?config:(string -> string -> unit) ->
  ?config_complete:(unit -> unit) ->
  ?config_help:string ->
  ?thread_model:(unit -> thread_model) ->
  ?magic_config_key:string ->
  ?preconnect:(bool -> unit) ->
  ?open_connection:(bool -> 'a) ->
  ?close:('a -> unit) ->
  ?get_size:('a -> int64) ->
  ?block_size:('a -> int * int * int64) ->
  ?can_cache:('a -> cache_flag) ->
  ?can_extents:('a -> bool) ->
  ?can_fast_zero:('a -> bool) ->
  ?can_flush:('a -> bool) ->
  ?can_fua:('a -> fua_flag) ->
  ?can_multi_conn:('a -> bool) ->
  ?can_trim:('a -> bool) ->
  ?can_write:('a -> bool) ->
  ?can_zero:('a -> bool) ->
  ?is_rotational:('a -> bool) ->
  ?pread:('a -> buf -> int64 -> flags -> unit) ->
  ?pwrite:('a -> buf -> int64 -> flags -> unit) ->
  ?flush:('a -> flags -> unit) ->
  ?trim:('a -> int64 -> int64 -> flags -> unit) ->
  ?zero:('a -> int64 -> int64 -> flags -> unit) ->
  ?extents:('a -> int64 -> int64 -> flags -> extent list) ->
  ?cache:('a -> int64 -> int64 -> flags -> unit) ->
  ?dump_plugin:(unit -> unit) ->
  ?list_exports:(bool -> bool -> export list) ->
  ?default_export:(bool -> bool -> string) ->
  ?export_description:('a -> string) ->
  'last ->
  unit

(** {1 Data} *)

(** The size of the buffer. *)
val buf_len : buf -> int

(** [blit_string_to_buf source from buf at length] copies as [Bytes.blit] does; so do the next two.

    @raise Invalid_argument if a range is not within its source or target. *)
val blit_string_to_buf : string -> int -> buf -> int -> int -> unit

val blit_bytes_to_buf : bytes -> int -> buf -> int -> int -> unit
val blit_buf_to_bytes : buf -> int -> bytes -> int -> int -> unit

(** {1 Data as strings} *)

(** [pread = Some (string_pread f)] where [f handle count offset flags] returns at least [count] bytes. *)
val string_pread : ('a -> int32 -> int64 -> flags -> string) -> 'a -> buf -> int64 -> flags -> unit

(** [pwrite = Some (string_pwrite f)] where [f handle data offset flags] writes all of [data]. *)
val string_pwrite : ('a -> string -> int64 -> flags -> unit) -> 'a -> buf -> int64 -> flags -> unit

(** [blit_to buf string] copies the beginning of [string], which must be as long as [buf] or longer. *)
val blit_to : buf -> string -> unit

(** A copy of the data as a string. *)
val to_string : buf -> string

(** {1 What a plugin may ask of the server}

    Values of parameters are parsed as all plugins parse them. A function that fails raises [Invalid_argument]; the server
    has logged why. One that the server is too old for raises [Failure]. *)

(** The error that the client gets if this callback raises an exception. Without it, [EIO]. *)
val set_error : Unix.error -> unit

val parse_size : string -> int64
val parse_bool : string -> bool

(** The first argument names the value in messages. *)
val parse_probability : string -> string -> float

(** Seconds and nanoseconds. The first argument names the value in messages. *)
val parse_delay : string -> string -> int * int

val read_password : string -> string
val realpath : string -> string
val absolute_path : string -> string
val stdio_safe : unit -> bool

(** Sleeps for seconds and nanoseconds. Other callbacks can run meanwhile if the plugin is linked with the library
    [threads].

    @raise Failure if the server ends or the client goes away meanwhile. *)
val nanosleep : int -> int -> unit

(** The export that the client asked for. *)
val export_name : unit -> string

val is_tls : unit -> bool

(** The address of the client; that of a Unix socket has no name in general.

    @raise Invalid_argument if there is no client, or none with an address of these kinds. *)
val peer_name : unit -> Unix.sockaddr

val peer_pid : unit -> int64
val peer_uid : unit -> int64
val peer_gid : unit -> int64
val peer_security_context : unit -> string
val peer_tls_dn : unit -> string
val peer_tls_issuer_dn : unit -> string

(** Ends the server. *)
val shutdown : unit -> unit

(** Ends this client's connection: at once if true, else after its replies. *)
val disconnect : bool -> unit

(** Logs a message that is shown with [-v]. Works like [Printf.printf]. *)
val debug : ('a, unit, string, unit) format4 -> 'a

(** The version of nbdkit that the plugin is compiled with. *)
val version : unit -> string

(** The version of the plugin interface. *)
val api_version : unit -> int
