//! `-u` and `-g`: the rights that are given up once the sockets are there.

use std::{
    ffi::{CString, OsStr},
    path::Path,
};

use anyhow::{Context as _, Result, anyhow};
use nix::unistd::{Gid, Group, Uid, User, chown, geteuid, getgrouplist, setgid, setgroups, setuid};

/// Who the server will be; None: who it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identity {
    user: Option<Uid>,
    group: Option<Gid>,
    /// The groups of a user that comes without a group: its own, the first one before all, instead of those that we have.
    /// The C nbdkit would keep root's.
    groups: Vec<Gid>,
}

/// The group of a user whose groups are not known.
const NOBODY: Gid = Gid::from_raw(65534);

impl Identity {
    /// Looks the user and the group up, by name or else by number.
    ///
    /// # Errors
    /// For those that do not exist.
    pub(crate) fn new(user: Option<&OsStr>, group: Option<&OsStr>) -> Result<Self> {
        let user = user.map(|name| {
            let text = name.to_str().unwrap_or_default();
            let known = User::from_name(text).context("-u: cannot read the list of users")?;
            known
                .map(|user| user.uid)
                .or_else(|| text.parse().ok().map(Uid::from_raw))
                .ok_or_else(|| anyhow!("-u option: {} is not a valid user name or uid", name.display()))
        });
        let group = group.map(|name| {
            let text = name.to_str().unwrap_or_default();
            let known = Group::from_name(text).context("-g: cannot read the list of groups")?;
            known
                .map(|group| group.gid)
                .or_else(|| text.parse().ok().map(Gid::from_raw))
                .ok_or_else(|| anyhow!("-g option: {} is not a valid group name or gid", name.display()))
        });
        let (user, group) = (user.transpose()?, group.transpose()?);
        let groups = match (user, group) {
            (Some(user), None) => groups_of(user)?,
            _ => Vec::new(),
        };
        Ok(Identity { user, group, groups })
    }

    /// Whether anything changes.
    pub(crate) fn changes(&self) -> bool {
        self.user.is_some() || self.group.is_some()
    }

    /// Gives a path to the new user, who has to remove it at the end.
    ///
    /// # Errors
    /// Without the right to do so.
    pub(crate) fn own(&self, path: &Path) -> Result<()> {
        chown(path, self.user, self.group)
            .with_context(|| format!("cannot change the owner of {}", path.display()))
    }

    /// Becomes the group and the user, for good.
    ///
    /// # Errors
    /// Without the right to do so.
    pub(crate) fn assume(&self) -> Result<()> {
        if let Some(group) = self.group {
            setgid(group).with_context(|| format!("-g: cannot become group {group}"))?;
            setgroups(&[group]).with_context(|| format!("-g: cannot leave the other groups for {group}"))?;
        }
        if let Some(first) = self.groups.first() {
            setgid(*first).with_context(|| format!("-u: cannot become group {first}"))?;
            setgroups(&self.groups).context("-u: cannot take the user's groups")?;
        }
        if let Some(user) = self.user {
            setuid(user).with_context(|| format!("-u: cannot become user {user}"))?;
        }
        Ok(())
    }
}

/// The groups of a user, the primary one first.
fn groups_of(user: Uid) -> Result<Vec<Gid>> {
    if user == geteuid() {
        return Ok(Vec::new());
    }
    let known = User::from_uid(user).context("-u: cannot read the list of users")?;
    let Some(known) = known else {
        log::warn!("-u: no group is known for user {user}, so group {NOBODY} is taken: give one with -g");
        return Ok(vec![NOBODY]);
    };
    let name = CString::new(known.name).context("-u")?;
    let mut groups = getgrouplist(&name, known.gid).context("-u: cannot read the list of groups")?;
    groups.retain(|group| *group != known.gid);
    groups.insert(0, known.gid);
    Ok(groups)
}
