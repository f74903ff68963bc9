//! What runs, as whom and where: the request over the image's config, by Kubernetes' rules.

use std::path::{Path, PathBuf};

use oci_spec::image::Config as ImageConfig;

use super::Refusal;
use crate::v1;

pub(crate) mod value;

/// For an image that names none; what containerd and Docker give.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The user of an image that names none; as a number it is looked up for its groups only.
const ROOT: &str = "0";
/// NGROUPS_MAX of Linux.
const MAX_GROUPS: usize = 65536;

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

/// The image's variables, then the request's, of which the last with a name wins. As in containerd,
/// U+FFFD stands for what is not UTF-8: an OCI spec is JSON.
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
        let value = String::from_utf8_lossy(&variable.value);
        if value.contains('\0') {
            let reason = format!("the value of {} holds a zero byte", variable.key);
            return Err(Refusal::invalid("envs", reason));
        }
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
    /// `user[:group]` to look up inside the root file system.
    pub lookup: String,
    /// Groups beside those that the image's `/etc/group` gives the user.
    pub groups: Vec<u32>,
    /// Policy Strict: the image's `/etc/group` gives none.
    pub strict: bool,
}

/// The request's user name, else its number, else the image's user, else root; as containerd has it.
pub fn identity(
    security: &v1::LinuxContainerSecurityContext,
    image_user: &str,
) -> Result<Identity, Refusal> {
    let id = |field: &str, value: i64| {
        // The last one says "leave as it is" to setresuid(2).
        u32::try_from(value)
            .ok()
            .filter(|id| *id != u32::MAX)
            .ok_or_else(|| Refusal::invalid(field, format!("{value} is outside of 0..2^32-2")))
    };
    let group = security.run_as_group.map(|group| id("run_as_group", group.value)).transpose()?;
    let number = security.run_as_user.map(|user| id("run_as_user", user.value)).transpose()?;
    let user = match security.run_as_username.as_str() {
        "" => number.map(|number| number.to_string()),
        name if name.contains([':', '/', '\0', ' ']) => {
            return Err(Refusal::invalid("run_as_username", format!("{name:?} is no user name")));
        }
        name => Some(name.to_string()),
    };
    let groups = security
        .supplemental_groups
        .iter()
        .map(|group| id("supplemental_groups", *group))
        .collect::<Result<Vec<_>, _>>()?;
    if groups.len() > MAX_GROUPS {
        return Err(Refusal::invalid(
            "supplemental_groups",
            format!("{} of them; at most {MAX_GROUPS} are taken", groups.len()),
        ));
    }
    let lookup = match (user, group) {
        (Some(user), Some(group)) => format!("{user}:{group}"),
        (Some(user), None) => user,
        (None, Some(_)) => {
            return Err(Refusal::invalid(
                "run_as_group",
                "given without run_as_user or run_as_username",
            ));
        }
        (None, None) => match image_user.trim() {
            "" => ROOT.to_string(),
            user => user.to_string(),
        },
    };
    let policy: v1::SupplementalGroupsPolicy =
        super::known("supplemental_groups_policy", security.supplemental_groups_policy)?;
    Ok(Identity { lookup, groups, strict: policy == v1::SupplementalGroupsPolicy::Strict })
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
        for (key, value) in [("", &b"x"[..]), ("a=b", b"x"), ("a", b"\0"), ("a", b"\xff\0")] {
            let variable = v1::KeyValue { key: key.into(), value: value.into() };
            assert!(environment("", false, &[variable], None).is_err(), "{key} {value:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_and_the_container_runs() {
        let variable = v1::KeyValue { key: "a".into(), value: b"x\xff\xfey".to_vec() };
        let env = environment("", false, &[variable], None).unwrap();
        assert_eq!(env[1], "a=x\u{fffd}\u{fffd}y");
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
        let both = v1::LinuxContainerSecurityContext { run_as_group: number(8), ..numeric.clone() };
        assert_eq!(of(both).unwrap(), "7:8");
        let name = v1::LinuxContainerSecurityContext { run_as_username: "redis".into(), ..numeric };
        assert_eq!(of(name).unwrap(), "redis", "a name comes before a number");
        assert_eq!(identity(&security(), " ").unwrap().lookup, "0");
        let group = v1::LinuxContainerSecurityContext { run_as_group: number(8), ..security() };
        assert!(of(group).is_err());
        for wrong in [-1, i64::from(u32::MAX), 1 << 40] {
            let user =
                v1::LinuxContainerSecurityContext { run_as_user: number(wrong), ..security() };
            assert!(of(user).is_err(), "{wrong}");
        }
    }

    #[test]
    fn groups_of_the_image_are_left_out_where_the_policy_is_strict() {
        let of = |policy| {
            identity(
                &v1::LinuxContainerSecurityContext {
                    supplemental_groups_policy: policy,
                    supplemental_groups: vec![5],
                    ..security()
                },
                "www-data",
            )
        };
        let merged = Identity { lookup: "www-data".into(), groups: vec![5], ..Identity::default() };
        assert_eq!(of(0), Ok(merged));
        assert!(of(1).unwrap().strict);
        assert!(of(2).is_err());
    }
}
