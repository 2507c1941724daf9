//! Who takes part in a run: the contestants of the list, less those that are not wanted, and the earlier release of this
//! project beside each of ours, under the same load in the same rounds.

use crate::{contestants::Contestant, contests::Contest};

/// What the name of a contestant ends with that runs the earlier release.
const SUFFIX: &str = ", earlier";

/// The contestant that does the same with the earlier release.
pub(crate) fn earlier(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// Whether a contestant of this name runs the earlier release.
pub(crate) fn is_earlier(name: &str) -> bool {
    name.ends_with(SUFFIX)
}

/// A contest as it is run. Lives as long as the program, as the list does: called once for each contest.
pub(crate) fn lineup(contest: &Contest, with_earlier: bool, without: &[String]) -> Contest {
    let (mut contestants, mut ratios) = (Vec::new(), contest.ratios.to_vec());
    for &contestant in contest.contestants {
        contestants.push(contestant);
        if with_earlier && contestant.is_ours() {
            let name = &*earlier(contestant.name).leak();
            contestants.push(Contestant { name, earlier: true, ..contestant });
            ratios.push((contestant.name, name));
        }
    }
    let wanted = |name: &str| without.iter().all(|left_out| left_out != name);
    contestants.retain(|contestant| wanted(contestant.name));
    ratios.retain(|(of, over)| wanted(of) && wanted(over));
    Contest { contestants: contestants.leak(), ratios: ratios.leak(), ..*contest }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contests::CONTESTS;

    fn names(contest: &Contest) -> Vec<&str> {
        contest.contestants.iter().map(|contestant| contestant.name).collect()
    }

    #[test]
    fn the_earlier_release_runs_beside_ours() {
        let contest = lineup(&CONTESTS[0], true, &["qemu-nbd".into()]);
        assert_eq!(names(&contest), ["ours", "ours, earlier", "nbdkit"]);
        assert_eq!(contest.ratios, [("ours", "nbdkit"), ("ours", "ours, earlier")]);
        let [ours, before, peer] = contest.contestants else { panic!("{contest:?}") };
        assert!(ours.is_ours() && !before.is_ours() && before.kind == ours.kind && !peer.earlier);
        assert!(is_earlier(before.name) && !is_earlier(ours.name));
    }

    #[test]
    fn every_row_of_ours_is_compared() {
        for contest in CONTESTS {
            let ours = contest.contestants.iter().filter(|contestant| contestant.is_ours()).count();
            let with = lineup(contest, true, &[]);
            assert_eq!(with.ratios.iter().filter(|(_, over)| is_earlier(over)).count(), ours);
            assert_eq!(names(&lineup(contest, false, &[])), names(contest));
        }
    }
}
