//! Which worker computes on which cores.

use rustix::thread::sched_getaffinity;

use super::roles;
use crate::flags::{CoreList, RoleName, ServeFlags};

/// One worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// Its name: role and number.
    pub(super) name: String,
    pub(super) role: RoleName,
    /// Its cores; empty lets it run anywhere.
    pub(super) cores: Vec<usize>,
}

/// Shares the machine out: contiguous cores for each worker, none used twice while there are enough.
pub(super) fn place(flags: &ServeFlags) -> anyhow::Result<Vec<Placement>> {
    let usable = usable_cores()?;
    for named in [&flags.deployment.cores, &flags.overrides.prefill_cores, &flags.overrides.decode_cores] {
        let missing = named.iter().flat_map(|list| &list.0).find(|core| !usable.contains(core));
        anyhow::ensure!(
            missing.is_none(),
            "core {} is not one that this process may use: {}",
            missing.unwrap_or(&0),
            CoreList(usable)
        );
    }
    let mut cores = match &flags.deployment.cores {
        Some(CoreList(cores)) => cores.clone(),
        None => usable,
    };
    if let Some(threads) = flags.engine.threads {
        cores.truncate(threads as usize);
    }
    let roles = roles(flags);
    let total: u32 = roles.iter().map(|(_, count)| count).sum();
    let mut shares = share(&cores, total as usize).into_iter();
    let mut placements = Vec::new();
    for (role, count) in roles {
        let own = match role {
            RoleName::Prefill => flags.overrides.prefill_cores.as_ref(),
            RoleName::Decode => flags.overrides.decode_cores.as_ref(),
            RoleName::Hybrid => None,
        };
        let mut own = own.map(|CoreList(cores)| share(cores, count as usize).into_iter());
        for number in 0..count {
            let general = shares.next().expect("one share for each worker");
            let cores = own.as_mut().and_then(Iterator::next).unwrap_or(general);
            placements.push(Placement {
                name: format!("{}-{number}", crate::flags::typed(role)),
                role,
                cores,
            });
        }
    }
    Ok(placements)
}

/// `count` contiguous shares of `cores`, the first ones larger by one where it does not come out even. With fewer cores
/// than shares, cores are used in turn.
fn share(cores: &[usize], count: usize) -> Vec<Vec<usize>> {
    if cores.len() < count {
        return (0..count)
            .map(|number| cores.get(number % cores.len().max(1)).copied().into_iter().collect())
            .collect();
    }
    let (each, more) = (cores.len() / count, cores.len() % count);
    let mut rest = cores;
    (0..count)
        .map(|number| {
            let (share, behind) = rest.split_at(each + usize::from(number < more));
            rest = behind;
            share.to_vec()
        })
        .collect()
}

fn usable_cores() -> anyhow::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_out() {
        type Row = (&'static str, &'static [usize], usize, &'static [&'static [usize]]);
        #[rustfmt::skip]
        let rows: [Row; 5] = [
            ("one each",                        &[0, 1],        2, &[&[0], &[1]]),
            ("the first takes what is odd",     &[0, 1, 2],     2, &[&[0, 1], &[2]]),
            ("all to the only one",             &[4, 5, 6],     1, &[&[4, 5, 6]]),
            ("too few are used in turn",        &[3],           2, &[&[3], &[3]]),
            ("none named, none pinned",         &[],            2, &[&[], &[]]),
        ];
        for (row, cores, count, expected) in rows {
            assert_eq!(share(cores, count), expected, "{row}");
        }
    }
}
