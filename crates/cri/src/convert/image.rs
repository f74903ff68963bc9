//! Images of the node to the interface's, and credentials the other way.

use std::collections::BTreeMap;

use image::{Auth, ImageInfo};

use crate::v1;

pub fn to_cri(info: &ImageInfo) -> v1::Image {
    let (uid, username) = user(&info.user);
    v1::Image {
        id: info.id.clone(),
        repo_tags: info.repo_tags.clone(),
        repo_digests: info.repo_digests.clone(),
        size: info.size,
        uid,
        username,
        spec: Some(v1::ImageSpec { image: info.id.clone(), ..Default::default() }),
        pinned: info.pinned,
    }
}

/// The image's user as a kubelet checks it against runAsNonRoot: a number, or a name. The group
/// does not count; neither stands for an image that names no user.
fn user(text: &str) -> (Option<v1::Int64Value>, String) {
    let user = text.split(':').next().unwrap_or_default();
    match user.parse() {
        Ok(value) => (Some(v1::Int64Value { value }), String::new()),
        Err(_) => (None, user.to_string()),
    }
}

/// Output of `crictl inspecti`.
pub fn info(info: &ImageInfo) -> BTreeMap<String, String> {
    let facts = serde_json::json!({
        "chainID": info.chain_id(),
        "imageSpec": &*info.config,
        "rootfs": info.erofs_path,
    });
    [("info".to_string(), facts.to_string())].into()
}

/// Empty credentials mean none: a kubelet always sends the message.
pub fn auth(config: Option<v1::AuthConfig>) -> Option<Auth> {
    let config = config.filter(|config| *config != v1::AuthConfig::default())?;
    Some(Auth {
        username: config.username,
        password: config.password,
        auth: config.auth,
        identity_token: config.identity_token,
        registry_token: config.registry_token,
        server_address: config.server_address,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_a_number_or_a_name_without_its_group() {
        let number = |value| Some(v1::Int64Value { value });
        for (text, uid, name) in [
            ("", None, ""),
            ("0", number(0), ""),
            ("1000", number(1000), ""),
            ("1000:2000", number(1000), ""),
            ("redis:redis", None, "redis"),
        ] {
            assert_eq!(user(text), (uid, name.to_string()), "{text:?}");
        }
    }

    #[test]
    fn empty_credentials_are_none() {
        assert!(auth(None).is_none());
        assert!(auth(Some(v1::AuthConfig::default())).is_none());
        let given = v1::AuthConfig { username: "u".into(), ..Default::default() };
        assert_eq!(auth(Some(given)).unwrap().username, "u");
    }
}
