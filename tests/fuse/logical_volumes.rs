//! Logical volumes that LVM's own tools have made, in the list of what is on disks.

use std::{fs, path::Path};

use crate::util::{NBDKIT_MOUNT, image, run, run_ok, sh, temp};

const MIB: u64 = 1 << 20;

/// Runs a script with LVM's tools on files, each of which is a device `$d1`, `$d2` … meanwhile; nothing is activated, so that
/// the kernel need not have the device mapper.
fn with_lvm(dir: &Path, files: &[&str], script: &str) -> String {
    let attach: String = files
        .iter()
        .zip(1..)
        .map(|(file, n)| format!("d{n}=$(losetup -f --show {file}); all=\"$all $d{n}\"; "))
        .collect();
    let names = (1..=files.len()).map(|n| format!("\\\"a|^$d{n}\\$|\\\",")).collect::<String>();
    sh(&format!(
        "set -e; export LVM_SYSTEM_DIR={0} LVM_SUPPRESS_FD_WARNINGS=1; all=; trap 'for d in $all; do losetup -d $d; done' EXIT; \
         {attach} lvm() {{ local tool=$1; shift; \
         command lvm $tool --driverloaded n --config \"devices {{ use_devicesfile=0 filter=[{names}\\\"r|.*|\\\"] }}\" \"$@\" \
         2>{0}/lvm.log || {{ cat {0}/lvm.log >&2; exit 1; }}; }}; {script}",
        dir.display()
    ))
}

/// Two disks of 64 MiB with a volume group over both: a linear volume, a striped one, and one in two parts.
fn two_disks(dir: &Path) -> [String; 2] {
    let disks = ["a", "b"].map(|name| image(dir, name, 64 * MIB).to_str().expect("UTF-8").to_owned());
    let make = "lvm lvcreate -qq -an -Zn -Wn";
    with_lvm(
        dir,
        &[&disks[0], &disks[1]],
        &format!(
            "lvm vgcreate -qq vg-x $d1 $d2; {make} -L 12M -n linear vg-x; \
             {make} -i 2 -I 64k -L 16M -n striped vg-x; {make} -l 100%FREE -n rest vg-x"
        ),
    );
    disks
}

fn volumes(words: &[&str]) -> Vec<serde_json::Value> {
    let listed = run_ok([&[NBDKIT_MOUNT, "--list", "--json"], words].concat());
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    listed["volumes"].as_array().expect("volumes").clone()
}

#[test]
fn volumes_over_two_disks_are_listed() {
    let dir = temp();
    let disks = two_disks(dir.path());
    let report = with_lvm(
        dir.path(),
        &[&disks[0], &disks[1]],
        "lvm lvs --noheadings -o lv_name,lv_uuid,lv_size --units b --nosuffix vg-x",
    );
    // The linear volume begins the data of the first disk, 1 MiB from its start. The superblock of btrfs is 64 KiB from the
    // start, where the second stripe of the striped one begins, which begins the data of the second disk.
    sh(&format!(
        "set -e; mkfs.ext4 -q -F -L in-lvm -E offset=1048576 {} 12288; \
         printf _BHRfS_M | dd of={} bs=1 seek=1048640 conv=notrunc status=none",
        disks[0], disks[1]
    ));
    let images = dir.path().join("images");
    fs::create_dir(&images).expect("mkdir");
    disks.iter().zip(["a", "b"]).for_each(|(disk, name)| fs::rename(disk, images.join(name)).expect("mv"));
    let found = volumes(&["file", &format!("dir={}", images.display())]);
    for line in report.lines() {
        let [name, id, size] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
        let volume = found.iter().find(|volume| volume["name"] == name).expect(name);
        assert_eq!((volume["uuid"].as_str(), volume["size"].to_string().as_str()), (Some(id), size));
        assert_eq!((&volume["refused"], &volume["group"]), (&serde_json::Value::Null, &"vg-x".into()));
    }
    assert_eq!(report.lines().count(), 3);
    let content = |name: &str, field: &str| {
        let volume = found.iter().find(|volume| volume["name"] == name).expect(name);
        volume["content"][field].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!((content("linear", "type"), content("linear", "label")), ("ext4".into(), "in-lvm".into()));
    assert_eq!(content("striped", "type"), "btrfs");
    assert_eq!(content("rest", "type"), "");
}

/// A volume of the metadata, with the body of its only segment.
fn volume(name: &str, number: usize, visible: bool, body: &str) -> String {
    let id = format!("{number:06}-aaaa-bbbb-cccc-dddd-eeee-ffffff");
    let visible = if visible { ", \"VISIBLE\"" } else { "" };
    format!(
        "{name} {{ id = \"{id}\" status = [\"READ\", \"WRITE\"{visible}] flags = [] segment_count = 1 \
         segment1 {{ start_extent = 0 extent_count = 1 {body} }} }}\n"
    )
}

/// Types whose targets the kernel need not have: LVM takes them over from a backup of the metadata.
#[test]
fn volumes_of_other_types_are_named() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 64 * MIB).to_str().expect("UTF-8").to_owned();
    let text = dir.path().join("text").to_str().expect("UTF-8").to_owned();
    with_lvm(
        dir.path(),
        &[&disk],
        &format!(
            "lvm vgcreate -qq vg $d1; lvm lvcreate -qq -an -Zn -Wn -L 4M -n base vg; \
             lvm lvcreate -qq -an -Zn -Wn -L 4M -n plain vg; lvm vgcfgbackup -qq -f {text} vg"
        ),
    );
    let on = |extent: usize| format!("type = \"striped\" stripe_count = 1 stripes = [\"pv0\", {extent}]");
    let mut text_of = String::from("logical_volumes {\n");
    let raids = ["r_rmeta_0", "r_rimage_0", "r_rmeta_1", "r_rimage_1"];
    let list = raids.map(|name| format!("\"{name}\"")).join(", ");
    for (number, (name, visible, body)) in [
        ("r", true, format!("type = \"raid1\" device_count = 2 region_size = 4096 raids = [{list}]")),
        (raids[0], false, on(4)),
        (raids[1], false, on(5)),
        (raids[2], false, on(6)),
        (raids[3], false, on(7)),
        (
            "pool",
            true,
            "type = \"thin-pool\" metadata = \"pool_tmeta\" pool = \"pool_tdata\" transaction_id = 0 chunk_size = 128 \
             discards = \"passdown\" zero_new_blocks = 1"
                .into(),
        ),
        ("pool_tmeta", false, on(8)),
        ("pool_tdata", false, on(9)),
        ("thin", true, "type = \"thin\" thin_pool = \"pool\" transaction_id = 0 device_id = 1".into()),
        ("snap", true, on(10)),
        (
            "snapshot0",
            false,
            "type = \"snapshot\" chunk_size = 8 origin = \"base\" cow_store = \"snap\"".into(),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        text_of += &volume(name, number, visible, &body);
    }
    let backup = fs::read_to_string(&text).expect("the backup");
    fs::write(&text, backup.replace("logical_volumes {\n", &text_of)).expect("write");
    with_lvm(dir.path(), &[&disk], &format!("lvm vgcfgrestore -qq --force -f {text} vg"));
    let found = volumes(&["file", &disk]);
    let refused: std::collections::BTreeMap<_, _> = found
        .iter()
        .map(|v| (v["name"].as_str().expect("a name"), v["refused"].as_str().unwrap_or_default()))
        .collect();
    let expected = [
        ("base", "it is the origin of a snapshot"),
        ("plain", ""),
        ("pool", "volumes of type thin-pool are not understood"),
        ("r", "volumes of type raid1 are not understood"),
        ("thin", "volumes of type thin are not understood"),
    ];
    assert_eq!(refused, expected.into_iter().collect());
}

#[test]
fn what_is_not_all_there_is_named() {
    let dir = temp();
    let [a, _] = two_disks(dir.path());
    let refused: Vec<_> = volumes(&["file", &a]).iter().map(|v| v["refused"].to_string()).collect();
    assert_eq!(refused[0], "null", "the linear one is all on this disk");
    assert!(refused[1].contains("is missing") && refused[2].contains("is missing"), "{refused:?}");
    // The same disk twice is not taken for two.
    let twice = dir.path().join("twice");
    fs::create_dir(&twice).expect("mkdir");
    for name in ["one", "two"] {
        fs::copy(&a, twice.join(name)).expect("copy");
    }
    let out = run([NBDKIT_MOUNT, "--list", "file", &format!("dir={}", twice.display())]);
    assert!(out.stdout.contains("is there more than once"), "{}", out.stdout);
}
