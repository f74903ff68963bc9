//! What runs, as whom and where: the request over the image's config, by Kubernetes' rules.

use std::path::{Path, PathBuf};

use oci_spec::image::Config as ImageConfig;

use super::Refusal;
use crate::v1;

/// For an image that names none; what containerd and Docker give.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// | request has | what runs |
/// |---|---|
/// | nothing | entrypoint + cmd of the image |
/// | args | the image's entrypoint + args |
/// | command | command |
/// | command, args | command + args |
pub fn command_line(
    command: &[String],
    args: &[String],
    image: Option<&ImageConfig>,
) -> Result<Vec<String>, Refusal> {
    let of_image = |part: Option<&Vec<String>>| part.cloned().unwrap_or_default();
    let mut line = command.to_vec();
    if command.is_empty() {
        line = of_image(image.and_then(|i| i.entrypoint().as_ref()));
        if args.is_empty() {
            line.extend(of_image(image.and_then(|i| i.cmd().as_ref())));
        }
    }
    line.extend(args.iter().cloned());
    if line.is_empty() {
        return Err(Refusal::invalid(
            "command",
            "empty, and the image has neither entrypoint nor cmd: say what to run",
        ));
    }
    if let Some(part) = line.iter().find(|part| part.contains('\0')) {
        return Err(Refusal::invalid("command", format!("{part:?} holds a zero byte")));
    }
    Ok(line)
}

/// The image's variables, then the request's, of which the last with a name wins.
pub fn environment(
    hostname: &str,
    tty: bool,
    envs: &[v1::KeyValue],
    image: Option<&ImageConfig>,
) -> Result<Vec<String>, Refusal> {
    let mut env = vec![DEFAULT_PATH.to_string()];
    if !hostname.is_empty() {
        env.push(format!("HOSTNAME={hostname}"));
    }
    if tty {
        env.push("TERM=xterm".into());
    }
    for entry in image.and_then(|i| i.env().as_ref()).into_iter().flatten() {
        put(&mut env, entry.clone());
    }
    for variable in envs {
        if variable.key.is_empty() || variable.key.contains(['=', '\0']) {
            return Err(Refusal::invalid("envs", format!("{:?} is no name", variable.key)));
        }
        let value = std::str::from_utf8(&variable.value)
            .ok()
            .filter(|value| !value.contains('\0'))
            .ok_or_else(|| {
                Refusal::invalid(
                    "envs",
                    format!("the value of {} is not UTF-8 text without zero bytes", variable.key),
                )
            })?;
        put(&mut env, format!("{}={value}", variable.key));
    }
    Ok(env)
}

fn put(env: &mut Vec<String>, entry: String) {
    let name = |entry: &str| entry.split_once('=').map_or(entry.len(), |(name, _)| name.len());
    let length = name(&entry);
    let same = |old: &&mut String| name(old) == length && old[..length] == entry[..length];
    match env.iter_mut().find(same) {
        Some(old) => *old = entry,
        None => env.push(entry),
    }
}

pub fn working_dir(requested: &str, image: Option<&ImageConfig>) -> Result<PathBuf, Refusal> {
    let of_image = image.and_then(|i| i.working_dir().as_deref()).unwrap_or_default();
    let dir = [requested, of_image, "/"].into_iter().find(|dir| !dir.is_empty());
    let dir = Path::new(dir.unwrap_or("/"));
    if !dir.is_absolute() {
        // An image may name a relative folder; containers start in the root, so it is one there.
        return match requested {
            "" => Ok(Path::new("/").join(dir)),
            _ => Err(Refusal::invalid("working_dir", format!("{requested:?} is not absolute"))),
        };
    }
    Ok(dir.to_path_buf())
}

/// Who the process is, as far as the host can tell.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// `user[:group]` to look up inside the root file system; empty: `uid` and `gid` count.
    pub lookup: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// The request's numeric user, else its user name, else the image's user, else root.
///
/// Groups that the image's `/etc/group` gives the user are joined in (policy Merge) by the lookup
/// in the guest. Under Strict there must be nothing to look up.
pub fn identity(
    security: &v1::LinuxContainerSecurityContext,
    image_user: &str,
) -> Result<Identity, Refusal> {
    let id = |field: &str, value: i64| {
        u32::try_from(value)
            .map_err(|_| Refusal::invalid(field, format!("{value} is outside of 0..2^32-1")))
    };
    let group = security.run_as_group.map(|group| id("run_as_group", group.value)).transpose()?;
    let user = match (security.run_as_user, security.run_as_username.as_str()) {
        (Some(user), _) => Some(id("run_as_user", user.value)?.to_string()),
        (None, "") => None,
        (None, name) if name.contains([':', '/', '\0', ' ']) => {
            return Err(Refusal::invalid("run_as_username", format!("{name:?} is no user name")));
        }
        (None, name) => Some(name.to_string()),
    };
    let groups = security
        .supplemental_groups
        .iter()
        .map(|group| id("supplemental_groups", *group))
        .collect::<Result<Vec<_>, _>>()?;
    let lookup = match (user, group) {
        (Some(user), Some(group)) => format!("{user}:{group}"),
        (Some(user), None) => user,
        (None, Some(_)) => {
            return Err(Refusal::invalid(
                "run_as_group",
                "given without run_as_user or run_as_username",
            ));
        }
        (None, None) => image_user.trim().to_string(),
    };
    let strict = super::known::<v1::SupplementalGroupsPolicy>(
        "supplemental_groups_policy",
        security.supplemental_groups_policy,
    )? == v1::SupplementalGroupsPolicy::Strict;
    if !strict {
        return Ok(Identity { lookup, groups, ..Identity::default() });
    }
    let numbers = match lookup.split_once(':') {
        None if lookup.is_empty() => Some((0, 0)),
        Some((user, group)) => user.parse().ok().zip(group.parse().ok()),
        None => None,
    };
    let Some((uid, gid)) = numbers else {
        return Err(Refusal::unsupported(
            "supplemental_groups_policy",
            "Strict needs run_as_user and run_as_group as numbers, so that nothing has to be \
             looked up in the image",
        ));
    };
    Ok(Identity { lookup: String::new(), uid, gid, groups })
}

#[cfg(test)]
mod tests {
    use oci_spec::image::ConfigBuilder;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_string).collect()
    }

    fn image() -> ImageConfig {
        ConfigBuilder::default()
            .entrypoint(words("/entry point"))
            .cmd(words("image cmd"))
            .env(words("PATH=/image A=image"))
            .working_dir("/image")
            .build()
            .unwrap()
    }

    #[test]
    fn command_and_args_override_entrypoint_and_cmd_as_kubernetes_says() {
        let image = image();
        for (command, args, expected) in [
            ("", "", "/entry point image cmd"),
            ("", "x y", "/entry point x y"),
            ("run it", "", "run it"),
            ("run it", "x", "run it x"),
        ] {
            let line = command_line(&words(command), &words(args), Some(&image)).unwrap();
            assert_eq!(line, words(expected), "{command:?} {args:?}");
        }
    }

    #[test]
    fn a_container_with_nothing_to_run_is_refused() {
        let refusal = command_line(&[], &[], None).unwrap_err();
        assert!(matches!(refusal, Refusal::Invalid { .. }));
    }

    #[test]
    fn the_requests_variables_win_over_the_images() {
        let key = |key: &str, value: &[u8]| v1::KeyValue { key: key.into(), value: value.into() };
        let env = environment(
            "pod",
            true,
            &[key("A", b"1"), key("B", b"x=y"), key("A", b"2")],
            Some(&image()),
        )
        .unwrap();
        assert_eq!(env, words("PATH=/image HOSTNAME=pod TERM=xterm A=2 B=x=y"));
    }

    #[test]
    fn variables_that_no_process_can_have_are_refused() {
        for (key, value) in [("", &b"x"[..]), ("a=b", b"x"), ("a", b"\xff"), ("a", b"\0")] {
            let variable = v1::KeyValue { key: key.into(), value: value.into() };
            assert!(environment("", false, &[variable], None).is_err(), "{key} {value:?}");
        }
    }

    #[test]
    fn the_working_folder_is_the_requests_then_the_images_then_the_root() {
        assert_eq!(working_dir("/a", Some(&image())).unwrap(), Path::new("/a"));
        assert_eq!(working_dir("", Some(&image())).unwrap(), Path::new("/image"));
        assert_eq!(working_dir("", None).unwrap(), Path::new("/"));
        assert!(working_dir("a", None).is_err());
    }

    fn security() -> v1::LinuxContainerSecurityContext {
        v1::LinuxContainerSecurityContext::default()
    }

    #[test]
    fn the_user_is_looked_up_where_the_image_has_it() {
        let number = |value| Some(v1::Int64Value { value });
        let of = |context: v1::LinuxContainerSecurityContext| {
            identity(&context, "www-data").map(|identity| identity.lookup)
        };
        assert_eq!(of(security()).unwrap(), "www-data");
        let numeric = v1::LinuxContainerSecurityContext { run_as_user: number(7), ..security() };
        assert_eq!(of(numeric.clone()).unwrap(), "7");
        let both = v1::LinuxContainerSecurityContext { run_as_group: number(8), ..numeric };
        assert_eq!(of(both).unwrap(), "7:8");
        let name =
            v1::LinuxContainerSecurityContext { run_as_username: "redis".into(), ..security() };
        assert_eq!(of(name).unwrap(), "redis");
        let group = v1::LinuxContainerSecurityContext { run_as_group: number(8), ..security() };
        assert!(of(group).is_err());
        let negative = v1::LinuxContainerSecurityContext { run_as_user: number(-1), ..security() };
        assert!(of(negative).is_err());
    }

    #[test]
    fn strict_groups_leave_nothing_to_look_up() {
        let strict = v1::LinuxContainerSecurityContext {
            supplemental_groups_policy: v1::SupplementalGroupsPolicy::Strict as i32,
            supplemental_groups: vec![5],
            ..security()
        };
        assert!(identity(&strict, "www-data").is_err());
        let numeric = v1::LinuxContainerSecurityContext {
            run_as_user: Some(v1::Int64Value { value: 7 }),
            run_as_group: Some(v1::Int64Value { value: 8 }),
            ..strict
        };
        assert_eq!(
            identity(&numeric, "www-data").unwrap(),
            Identity { lookup: String::new(), uid: 7, gid: 8, groups: vec![5] }
        );
    }
}
