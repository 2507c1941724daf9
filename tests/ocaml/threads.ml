(* Linked with the library threads: callbacks overlap while one of them sleeps, and OCaml's own threads run. *)
let waiting = ref 0
let most = ref 0
let ticks = ref 0
let mutex = Mutex.create ()

let ticker () =
  while true do
    Thread.delay 0.001;
    Mutex.lock mutex;
    incr ticks;
    Gc.minor ();
    Mutex.unlock mutex
  done

let pread _ buf offset _ =
  incr waiting;
  most := max !most !waiting;
  if offset = 0L then begin
    (* Until another request is in here too. *)
    while !most < 2 do NBDKit.nanosleep 0 1_000_000 done
  end;
  while !ticks = 0 do NBDKit.nanosleep 0 1_000_000 done;
  decr waiting;
  Bigarray.Array1.fill buf (Char.chr (Char.code '0' + !most))

let () =
  NBDKit.register_plugin
    {
      NBDKit.default_callbacks with
      name = "threads";
      after_fork = Some (fun () -> ignore (Thread.create ticker ()));
      open_connection = Some (fun _ -> ());
      get_size = Some (fun () -> 1048576L);
      pread = Some pread;
    }
