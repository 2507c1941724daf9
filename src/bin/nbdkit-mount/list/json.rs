//! The listing for programs.

use nbdkit_common::{Content, Usage};
use serde_json::{Value, json};

use super::{Disk, Listing, Volume};

impl Listing {
    /// One object with all there is.
    pub(super) fn json(&self) -> Value {
        json!({
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
            "volumes": self.volumes.iter().map(volume).collect::<Vec<_>>(),
            "warnings": self.warnings,
        })
    }
}

fn disk(disk: &Disk) -> Value {
    let table = disk.survey.table.as_ref();
    let partitions = disk.survey.partitions().map(|(partition, found)| {
        let within = partition.length_within(disk.size);
        let file = nbdkit_fuse::partition_name(&disk.file, partition.number);
        json!({
            "number": partition.number,
            "file": (within > 0).then(|| file.to_string_lossy()),
            "start": partition.start,
            "size": within,
            "size_in_table": partition.length,
            "clipped": within < partition.length,
            "type": partition.kind.to_string(),
            "type_name": partition.kind.name(),
            "name": (!partition.name.is_empty()).then_some(&partition.name),
            "uuid": partition.uuid,
            "slice": partition.slice,
            "content": found.map(content),
        })
    });
    json!({
        "file": disk.file.to_string_lossy(),
        "export": disk.export.to_string_lossy(),
        "size": disk.size,
        "format": disk.format.map_or("raw", |format| format.name),
        "table": table.map(|table| table.scheme.id()),
        "table_uuid": table.and_then(|table| table.uuid.as_ref()),
        "sector_size": table.map(|table| table.sector_size),
        "content": disk.survey.whole.as_ref().map(content),
        "partitions": partitions.collect::<Vec<_>>(),
        "warnings": disk.survey.warnings,
    })
}

fn volume(volume: &Volume) -> Value {
    json!({
        "device": volume.device,
        "group": volume.group,
        "name": volume.name,
        "uuid": volume.id,
        "size": volume.size,
        "refused": volume.refused,
        "content": volume.content.as_ref().map(content),
    })
}

fn content(content: &Content) -> Value {
    let usage = match content.usage {
        Usage::FileSystem => "filesystem",
        Usage::Member => "member",
        Usage::Crypto => "crypto",
        Usage::Other => "other",
    };
    json!({
        "type": content.kind,
        "usage": usage,
        "label": content.label,
        "uuid": content.uuid,
        "needs_recovery": content.needs_recovery,
    })
}
