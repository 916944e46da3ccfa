"use strict";
(async () => {
  const part = (name) => document.getElementById(name);
  const unpack = async (name) => {
    const bytes = Uint8Array.from(atob(part(name).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const address = (text) => URL.createObjectURL(new Blob([text], { type: "text/javascript" }));

  // Details: a click on what has data-shows shows that entry of the part "details", whose HTML the
  // template has escaped.
  const details = part("details") ? JSON.parse(await unpack("details")) : {};
  document.addEventListener("click", (event) => {
    const name = event.target.closest("[data-shows]")?.dataset.shows;
    if (!(name in details)) return;
    part("shown").innerHTML = details[name];
    if (!part("dialog").open) part("dialog").showModal();
    part("dialog").scrollTop = 0;
  });

  // Long texts, and a drawing shown large: each is in the page once.
  for (const place of document.querySelectorAll("[data-text]"))
    place.textContent = await unpack(place.dataset.text);
  document.addEventListener("toggle", (event) => {
    const large = event.target.querySelector(".zoomed");
    if (large && event.newState === "open")
      large.replaceChildren(event.target.parentElement.querySelector("img").cloneNode());
  }, true);

  // What is left of the table of numbers, by artifact: the charts show the same.
  const left = { artifacts: null, show: () => {} };

  // Tables: what is said of one is in its data-options, rows may lie in a part of their own.
  if (part("tables-js")) {
    const style = document.createElement("style");
    style.textContent = await unpack("tables-css");
    document.head.prepend(style);
    const library = await import(address(await unpack("tables-js")));
    library.set_or_remove_dark_class();
    const show = { // a number that opens its source: [shown, order, source]
      sourced: (cell, kind) => {
        if (kind === "sort" || kind === "type") return cell[1];
        if (kind !== "display") return cell[0];
        const button = document.createElement("button");
        Object.assign(button, { className: "link", textContent: cell[0] });
        button.dataset.shows = cell[2];
        return button;
      },
      text: library.default.render.text(),
    };
    for (const table of document.querySelectorAll("table[data-options]")) {
      const options = JSON.parse(table.dataset.options);
      if (options.rows) options.data = JSON.parse(await unpack(options.rows));
      for (const column of options.columns ?? []) column.render = show[column.render];
      const drawn = new library.default(table, options);
      if (options.rows !== "numbers") continue;
      drawn.on("draw", () => {
        const rows = drawn.rows({ search: "applied" }).data().toArray();
        left.artifacts = new Set(rows.map((row) => row[7][2]));
        left.show();
      });
    }
  }

  // Charts: items of Bokeh, each for the element whose name it has.
  if (part("charts")) {
    const script = document.createElement("script");
    script.src = address(await unpack("charts-js"));
    await new Promise((done) => { script.onload = done; document.head.append(script); });
    const points = []; // [source, its points as they came]
    for (const item of JSON.parse(await unpack("charts"))) {
      const [view] = await Bokeh.embed.embed_item(item);
      for (const model of view.model.references())
        if (model.type === "ColumnDataSource")
          points.push([model, new Map(model.columns().map((name) => [name, [...model.get_column(name)]]))]);
    }
    left.show = () => {
      for (const [source, all] of points) {
        const stays = all.get("artifact").map((name) => left.artifacts.has(name));
        const of = ([name, values]) => [name, values.filter((_, place) => stays[place])];
        source.data = new Map([...all].map(of));
      }
    };
    if (left.artifacts) left.show();
  }
  document.documentElement.dataset.ready = "yes";
})();
