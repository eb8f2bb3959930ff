"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const readout = document.getElementById("readout");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  const opacity = document.getElementById("opacity");
  const showOpacity = () => {
    document.documentElement.style.setProperty("--opacity", opacity.value / 100);
    document.getElementById("opacity-value").textContent = opacity.value + " %";
  };
  opacity.addEventListener("input", showOpacity);
  showOpacity();

  const unsmoothed = document.getElementById("unsmoothed");
  const showPatches = () => document.body.classList.toggle("unsmoothed", unsmoothed.checked);
  unsmoothed.addEventListener("change", showPatches);
  showPatches();

  for (const box of all("input[data-switch]")) {
    const show = () => all(`[data-method="${box.dataset.switch}"]`)
      .forEach((each) => each.toggleAttribute("hidden", !box.checked));  // curves have no property of that name
    box.addEventListener("change", show);
    show();
  }

  const number = (value) => value === null ? "not finite" : String(Number(value.toPrecision(4)));
  // `taken`: the share of the picture's height and width that all patches take up
  const place = (cursor, { grid: [h, w], taken: [tall, wide] }, patch) => {
    const along = (length, at) => Math.min(length, 1 - at) * 100 + "%";
    const top = tall * Math.floor(patch / w) / h, left = wide * (patch % w) / w;
    cursor.hidden = false;
    cursor.style.left = 100 * left + "%";
    cursor.style.top = 100 * top + "%";
    cursor.style.width = along(wide / w, left);
    cursor.style.height = along(tall / h, top);
  };
  const name = ([, w], patch) => `row ${Math.floor(patch / w) + 1}, column ${patch % w + 1}`;

  for (const view of all(".map")) {
    const map = data.maps[view.dataset.map];
    const [h, w] = map.grid, [tall, wide] = map.taken;
    const cursor = view.querySelector(".cursor");
    let patch = null;
    const look = (index) => {
      patch = index;
      place(cursor, map, patch);
      readout.textContent = `${view.dataset.title}: ${number(map.scores[patch])} at ${name(map.grid, patch)}`;
    };
    const leave = () => { if (document.activeElement !== view) cursor.hidden = true; };
    const under = (event) => {
      const box = view.getBoundingClientRect();
      const row = Math.min(h - 1, Math.max(0, Math.floor(h * (event.clientY - box.top) / box.height / tall)));
      const column = Math.min(w - 1, Math.max(0, Math.floor(w * (event.clientX - box.left) / box.width / wide)));
      return row * w + column;
    };
    view.addEventListener("pointermove", (event) => look(under(event)));
    view.addEventListener("pointerleave", leave);
    view.addEventListener("blur", () => { cursor.hidden = true; });
    view.addEventListener("focus", () => look(patch ?? Math.floor(h / 2) * w + Math.floor(w / 2)));
    view.addEventListener("click", (event) => { look(under(event)); attend(view, map, patch); });
    view.addEventListener("keydown", (event) => {
      const row = Math.floor(patch / w), column = patch % w;
      const moved = {
        ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
        ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      }[event.key];
      if (moved) {
        event.preventDefault();
        if (moved[0] >= 0 && moved[0] < h && moved[1] >= 0 && moved[1] < w) look(moved[0] * w + moved[1]);
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        attend(view, map, patch);
      }
    });
  }

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const decoded = new Map();
  const rows = (scene) => {
    if (!decoded.has(scene)) {
      const found = data.attention[scene];
      decoded.set(scene, {
        levels: bytes(found.levels),
        peaks: new Float32Array(bytes(found.peaks).buffer),
        onPatches: new Float32Array(bytes(found.onPatches).buffer),
      });
    }
    return decoded.get(scene);
  };
  const colours = bytes(data.colours);

  const attend = (view, map, patch) => {
    const found = data.attention[map.scene];
    if (!found || found.grid.join() !== map.grid.join()) {
      readout.textContent += ". No rows of attention are written in for this map";
      return;
    }
    view.closest(".grid").after(panelOf(map.scene));
    show(map.scene, found.prefix + patch, patch);
  };

  const panelOf = (scene) => document.querySelector(`.attention[data-scene="${scene}"]`);

  const show = (scene, token, patch) => {
    const found = data.attention[scene];
    const [h, w] = found.grid, [tall, wide] = found.taken;
    const tokens = found.prefix + h * w;
    const { levels, peaks, onPatches } = rows(scene);
    const panel = panelOf(scene);
    panel.hidden = false;
    const from = patch === null ? `prefix token ${token + 1}` : `the patch in ${name(found.grid, patch)}`;
    panel.querySelector("h4").textContent = `What ${from} attends to, block by block`;
    all("figure", panel).forEach((figure, block) => {
      const row = block * tokens + token;
      const canvas = figure.querySelector("canvas");
      canvas.width = w;
      canvas.height = h;
      canvas.style.width = 100 * wide + "%";
      canvas.style.height = 100 * tall + "%";
      const context = canvas.getContext("2d");
      const pixels = context.createImageData(w, h);
      for (let index = 0; index < h * w; index += 1) {
        const level = levels[row * h * w + index], strength = level / 255;
        pixels.data.set(colours.subarray(3 * level, 3 * level + 3), 4 * index);
        pixels.data[4 * index + 3] = 255 * strength * (2 - strength);
      }
      context.putImageData(pixels, 0, 0);
      const cursor = figure.querySelector(".cursor");
      if (patch === null) cursor.hidden = true; else place(cursor, found, patch);
      figure.querySelector(".share").textContent =
        `at most ${(100 * peaks[row]).toFixed(1)} % of ${(100 * onPatches[row]).toFixed(0)} %`;
    });
    readout.textContent = panel.querySelector("h4").textContent;
    panel.scrollIntoView({ block: "nearest" });
  };

  for (const button of all("button[data-token]")) {
    button.addEventListener("click", () => show(Number(button.dataset.scene), Number(button.dataset.token), null));
  }
})();
